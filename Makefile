# Two commands for a newcomer; both make their own virtual environment in .venv and leave the system's Python alone.
#   make quickstart   set up, and run the quickstart from nothing to a report and a chat
#   make test         set up, and run every check that CI runs
# With a CUDA machine or a torch of your own: make quickstart TORCH="torch==2.13.0 --index-url https://…"

PYTHON ?= python3
VENV ?= .venv
# Not in constraints.txt: whoever brings a torch of his own keeps it.
TORCH ?= torch==2.13.0

# LLaVA as its users have it; PyPI's is its git c121f04. It pins other libraries, hence --no-deps.
LLAVA := llava-torch==1.2.2.post1
OLD := .venv-llava437
LMMS := .venv-lmms-eval

BIN := $(VENV)/bin

.PHONY: quickstart test setup

quickstart: setup
	$(BIN)/aimv2-mllm run recipes/quickstart.yaml

test: setup $(OLD)/installed $(LMMS)/lmms_eval.txt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "$(PYTHON) is older than Python 3.11: make PYTHON=python3.11 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --no-deps $(LLAVA)
	touch $@

# The libraries that LLaVA was made for, beside today's torch: tests run in it what they run here.
$(OLD)/installed: tests/llava437.txt
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install $(TORCH)
	$(OLD)/bin/python -m pip install -r tests/llava437.txt
	$(OLD)/bin/python -m pip install --no-deps $(LLAVA)
	touch $@

# A layer over $(VENV), without torch; it has the loop that tests compare `evaluate` with.
$(LMMS)/lmms_eval.txt: aimv2_mllm/assets/lmms_eval.txt $(VENV)/installed
	$(BIN)/python -m aimv2_mllm.lmms.environment $(LMMS)
	touch $@
