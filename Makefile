# memory3. `make test` is the only command a fresh machine needs.
BUILD   ?= build
JOBS    ?= $(shell nproc)
PRESET  ?= release
CONFIGURE ?=

.PHONY: setup build test bench check bundle clean

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

clean:
	@rm -rf build build-*
