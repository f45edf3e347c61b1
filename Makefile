# make kd    sets up and runs the main job: a table and a picture at the end
# make test  sets up and runs the checks; EXTRAS=test,parity adds the parity tests against torch
# make docs  sets up and builds the pages: open build/docs/index.html
PYTHON ?= python3
EXTRAS ?= test
BIN = .venv/bin
KD ?= configs/kd.py
WORKDIR ?= workdir/kd

.PHONY: kd test lint docs clean

kd: .venv/core.done
	$(BIN)/python -m jaxdistill.main --config=$(KD) --workdir=$(WORKDIR)

test: .venv/$(EXTRAS).done lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q

lint: .venv/$(EXTRAS).done
	$(BIN)/ruff check .

docs: .venv/docs.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/core.done: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/%.done: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@ .venv/core.done

.venv/bin/python:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv workdir build *.egg-info
