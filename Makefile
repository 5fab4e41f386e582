# The commands of this repository. Everything they install goes into .venv; nothing needs root.

PYTHON ?= python3
# A further package index, for torch: the default index's Linux builds of it may bring CUDA (gigabytes). pip prefers
# the builds marked +cpu where it sees both; PyTorch's installation page names an index that has them.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Both variables, because which of them pins the build tools too depends on pip's version.
INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --quiet

.PHONY: run test test-all check bench install constraints clean

run: $(INSTALLED) ## serve the embedded model, ask it one question, stay up
	@$(BIN)/plait demo

test: $(INSTALLED) ## the tests that a change must pass
	@$(BIN)/python -m pytest

test-all: $(INSTALLED) ## those and the slow ones
	@$(BIN)/python -m pytest -m ''

check: $(INSTALLED) ## format, lint, types
	@$(BIN)/ruff format .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

bench: $(INSTALLED) ## the measurements of docs/systems, one JSON and plot each
	@for question in $(filter-out bench/results.py,$(wildcard bench/*.py)); do echo "$$question"; $(BIN)/python "$$question" || exit 1; done

install: $(INSTALLED)

# One file says that everything is installed as the two files ask; it is written last.
$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): minutes the first time, again only after a change of pyproject.toml, constraints.txt or csrc"
	@$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[test,check,bench,build]'
	@touch $@

constraints: ## pin what .venv holds now, after its tests have passed
	@sed -n '/^#/p' constraints.txt > constraints.new
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' | grep -v ' @ ' >> constraints.new
	@mv constraints.new constraints.txt

clean: ## remove what was installed and cached
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
