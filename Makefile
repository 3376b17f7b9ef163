# memory3. `make test` is the only command a fresh machine needs.
BUILD   ?= build
JOBS    ?= $(shell nproc)
PRESET  ?= release
CONFIGURE ?=

.PHONY: setup build test bench check bundle demo serve evaluate clean

setup:           ## install what is missing
	@tools/setup

build: setup     ## configure and build everything
	@cmake --preset $(PRESET) -B $(BUILD) $(CONFIGURE) >/dev/null
	@cmake --build $(BUILD) -j $(JOBS)

test: build      ## set up, build and run the fast tests
	@ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS)

bench: build     ## NAME=decoder_cpu, or all this machine can run
	@bench/run --build $(BUILD) $(NAME)

check: setup     ## formatting, clang-tidy, sanitizers over the unit tests, short fuzzing
	@tools/check

bundle: build    ## binaries with their libraries, for a machine without packages
	@tools/bundle $(BUILD)

demo: build      ## both servers, the demo's documents, its questions with and without memory; stops them
	@$(BUILD)/bin/memory3 demo --directory $(BUILD)/demo

serve: build     ## both servers with models/tiny until Ctrl-C; prints the page's address
	@$(BUILD)/bin/memory3 serve --model models/tiny --data $(BUILD)/serve

evaluate: build  ## answers with and without memory, measured through the servers; FLAGS="--questions 20"
	@$(BUILD)/bin/memory3_evaluate --directory $(BUILD)/evaluate $(FLAGS)

clean:
	@rm -rf build build-*
