# memory3. `make test` is the only command a fresh machine needs.
BUILD   ?= build
JOBS    ?= $(shell nproc)
PRESET  ?= release
CONFIGURE ?=

.PHONY: setup configure build programs test bench check bundle demo serve evaluate clean

setup:           ## install what is missing
	@tools/setup

configure: setup
	@cmake --preset $(PRESET) -B $(BUILD) $(CONFIGURE) >/dev/null

build: configure ## build everything
	@cmake --build $(BUILD) -j $(JOBS)

programs: configure ## build what people run, without tests and benchmarks: half the time
	@cmake --build $(BUILD) -j $(JOBS) --target programs

test: configure  ## set up, build and run the fast tests
	@cmake --build $(BUILD) -j $(JOBS) --target tested
	@ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS)

bench: build     ## NAME=decoder_cpu, or all this machine can run
	@bench/run --build $(BUILD) $(NAME)

check: setup     ## formatting, clang-tidy, sanitizers over the unit tests, short fuzzing
	@tools/check

bundle: build    ## binaries with their libraries, for a machine without packages
	@tools/bundle $(BUILD)

demo: programs   ## both servers, the demo's documents, its questions with and without memory; stops them
	@$(BUILD)/bin/memory3 demo --directory $(BUILD)/demo

serve: programs  ## both servers with models/tiny until Ctrl-C; prints the page's address
	@$(BUILD)/bin/memory3 serve --model models/tiny --data $(BUILD)/serve

evaluate: build  ## answers with and without memory, measured through the servers; FLAGS="--questions 20"
	@$(BUILD)/bin/memory3_evaluate --directory $(BUILD)/evaluate $(FLAGS)

clean:
	@rm -rf build build-*
