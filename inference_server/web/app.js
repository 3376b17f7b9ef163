// The page to try the server: one prompt, two streamed answers. All that comes from the server is
// put in as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);

let model = null; // of GET /v1/models
let running = null; // AbortController of the two answers

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function headers() {
  const all = { "Content-Type": "application/json" };
  if ($("key").value) all.Authorization = `Bearer ${$("key").value}`;
  return all;
}

function complain(where, words) {
  where.textContent = words;
  where.hidden = !words;
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function loadModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) {
      $("key-field").hidden = false;
      $("model").textContent = "this server wants an API key";
      return;
    }
    if (!response.ok) throw new Error(await errorOf(response));
    model = (await response.json()).data[0];
  } catch (error) {
    $("model").textContent = String(error.message || error);
    return;
  }
  complain($("problem"), "");
  const about = [model.id, model.device, model.weights];
  if (model.memory.dense_mode) about.push("dense mode");
  $("model").textContent = about.filter(Boolean).join(" · ");
  const bases = model.memory.knowledge_bases;
  $("base").replaceChildren(
    ...(bases.length ? bases : [""]).map((name) =>
      element("option", { value: name }, name || "none on this server")));
  $("base").disabled = bases.length === 0;
}

// One of the two answers: where its text goes, chunk by chunk as the server cuts it.
class Answer {
  constructor(id) {
    this.section = $(id);
    this.text = this.section.querySelector(".text");
    this.numbers = this.section.querySelector(".numbers");
    this.clear();
  }

  clear() {
    this.text.replaceChildren();
    this.numbers.replaceChildren();
    this.current = null; // the paragraph that text is added to
    this.pieces = []; // its tokens: text nodes and which token of the answer each is
    this.tokens = 0;
    this.answerBegin = null; // where the server's count of tokens reaches the answer
    this.began = this.first = this.last = 0;
  }

  start() {
    this.clear();
    this.began = performance.now();
    this.section.classList.add("running");
    this.section.setAttribute("aria-busy", "true");
  }

  stop() {
    this.section.classList.remove("running");
    this.section.removeAttribute("aria-busy");
  }

  paragraph() {
    if (!this.current) {
      this.current = element("p");
      this.text.append(element("div", { class: "chunk" }, this.current));
    }
    return this.current;
  }

  // `tokens`: the texts of the tokens that `text` consists of.
  add(text, tokens) {
    if (!text && !tokens.length) return;
    const now = performance.now();
    this.first ||= now;
    this.last = now;
    // A character may end in another event than the token that begins it: such texts stay whole.
    const parts = tokens.join("") === text ? tokens : [text, ...tokens.slice(1).map(() => "")];
    for (const part of parts) {
      const node = document.createTextNode(part);
      this.pieces.push({ node, token: this.tokens });
      if (tokens.length) ++this.tokens;
      this.paragraph().append(node);
    }
    this.show();
  }

  show(usage, timings) {
    const tokens = usage ? usage.completion_tokens : this.tokens;
    const entries = [];
    const first = timings ? timings.time_to_first_token_ms : this.first - this.began;
    if (this.first || timings) entries.push([`${Math.round(first)} ms`, "to the first token"]);
    // Few tokens may arrive all at once: in the end the server's own clock counts.
    const seconds = (timings ? timings.decode_ms : this.last - this.first) / 1000;
    if (tokens > 1 && seconds > 0) entries.push([((tokens - 1) / seconds).toFixed(1), "tokens/s"]);
    if (tokens) entries.push([String(tokens), "tokens"]);
    this.numbers.replaceChildren(...entries.map(([value, name]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }

  // What a chunk read stands under it; what comes next begins a new paragraph.
  read(chunk) {
    const what = `${chunk.generated ? "answer" : "prompt"}, tokens ${chunk.token_begin} to ${chunk.token_end}`;
    let place;
    if (chunk.generated) {
      // Told as its first token is read again: that token is here already and moves to it. The rest
      // is still to come, above what it read.
      this.answerBegin ??= chunk.token_begin;
      const begin = chunk.token_begin - this.answerBegin;
      this.pieces = this.pieces.filter((piece) => piece.token >= begin);
      const before = this.current;
      this.current = element("p");
      this.current.append(...this.pieces.map((piece) => piece.node));
      if (before && !before.hasChildNodes()) before.parentNode.remove();
      place = element("div", { class: "chunk" }, this.current);
    } else {
      place = element("div", { class: "chunk given" });
    }
    place.dataset.chunk = chunk.chunk;
    place.append(chunk.memories.length ? this.sources(chunk, what) : this.nothing(chunk, what));
    this.text.append(place);
  }

  nothing(chunk, what) {
    const why = chunk.unavailable ? "the memory server could not be reached"
      : chunk.timed_out ? "nothing came in time" : "nothing fits";
    return element("p", { class: "empty" }, `read nothing (${what}): ${why}`);
  }

  sources(chunk, what) {
    const count = chunk.memories.length;
    const title = `read ${count} ${count === 1 ? "memory" : "memories"}`;
    const list = element("ol");
    for (const memory of chunk.memories) {
      const item = element("li");
      for (const source of memory.sources) {
        item.append(element("div", { class: "source" }, ...this.source(source)));
      }
      item.append(element("div", { class: "facts" },
        element("span", {}, `score ${memory.score.toFixed(3)}`),
        element("span", {}, `from ${memory.from}`),
        element("span", { title: memory.record_id }, `id ${memory.record_id.slice(0, 10)}`)));
      list.append(item);
    }
    const of = [what];
    if (chunk.inherited) of.push("as the prompt's last chunk");
    if (chunk.timed_out) of.push("others came too late");
    return element("details", {},
      element("summary", {}, element("span", {}, title), element("span", { class: "of" }, of.join(" · "))),
      list);
  }

  source(source) {
    const parts = [element("b", {}, source.title || source.document_id || "untitled")];
    parts.push(` · characters ${source.char_begin} to ${source.char_end}`);
    if (source.uri) {
      // A link only where it leads to a page: anything else stays text.
      const web = /^https?:\/\//i.test(source.uri);
      parts.push(" · ", web
        ? element("a", { href: source.uri, target: "_blank", rel: "noopener noreferrer" }, source.uri)
        : source.uri);
    }
    if (source.text) parts.push(element("blockquote", {}, source.text));
    return parts;
  }

  fail(words) {
    this.text.append(element("p", { class: "problem", role: "alert" }, words));
  }

  async run(path, body, signal) {
    this.start();
    try {
      const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
      if (!response.ok) throw new Error(await errorOf(response));
      let timings;
      for await (const event of serverSentEvents(response.body)) {
        if (event === "[DONE]") break;
        const part = JSON.parse(event);
        if (part.error) throw new Error(part.error.message);
        for (const chunk of part.memory?.chunks || []) this.read(chunk);
        timings = part.timings || timings;
        const choice = part.choices[0];
        if (choice) {
          const tokens = choice.logprobs?.content?.map((one) => one.token) || choice.logprobs?.tokens || [];
          this.add(choice.text ?? choice.delta.content ?? "", tokens);
        }
        if (part.usage) this.show(part.usage, timings);
      }
    } catch (error) {
      if (error.name !== "AbortError") this.fail(String(error.message || error));
    } finally {
      this.stop();
    }
  }
}

async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    for (let end; (end = buffer.indexOf("\n\n")) >= 0; buffer = buffer.slice(end + 2)) {
      const event = buffer.slice(0, end);
      if (event.startsWith("data: ")) yield event.slice(6);
    }
  }
}

const withMemory = new Answer("with");
const withoutMemory = new Answer("without");

async function ask() {
  if (running) return;
  if (!model) await loadModel();
  if (!model) return complain($("problem"), $("model").textContent);
  complain($("problem"), "");
  const chat = $("mode").value === "chat";
  const prompt = $("prompt").value;
  const body = {
    model: model.id,
    max_tokens: Number($("tokens").value),
    temperature: Number($("temperature").value),
    seed: Math.floor(Math.random() * 2 ** 31), // one for both, so that only memory differs
    logprobs: chat ? true : 0, // tells the tokens of each part
    ...($("line").checked ? { stop: ["\n"] } : {}),
    stream: true,
    stream_options: { include_usage: true },
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  const base = $("base").value;
  const path = chat ? "v1/chat/completions" : "v1/completions";
  running = new AbortController();
  $("go").disabled = true;
  $("stop").disabled = false;
  const answers = [withoutMemory.run(path, { ...body, memory: false }, running.signal)];
  if (base) {
    const memory = { knowledge_base: base, with_text: true };
    answers.push(withMemory.run(path, { ...body, memory }, running.signal));
  } else {
    withMemory.clear();
    withMemory.fail("This server has no knowledge base for this model.");
  }
  await Promise.all(answers);
  running = null;
  $("go").disabled = false;
  $("stop").disabled = true;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", () => running?.abort());
$("key").addEventListener("change", loadModel);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
loadModel();
