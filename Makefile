# `make demo` and `make test` work on a fresh machine: they make .venv, install into it once, and run.
# As root on Debian, `make test` also installs the chromium that opens the page of a report.

RUN := .venv/bin/python

.PHONY: demo test clean

demo: .venv/installed
	@$(RUN) scripts/demo.py

test: .venv/installed
	@sh scripts/find_browser.sh
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(RUN) -m pytest $(PYTEST)

.venv/installed: pyproject.toml scripts/find_python.sh
	@python="$$(sh scripts/find_python.sh)" && \
	{ $(RUN) -c 'import pip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || \
	"$$python" -m venv --clear .venv; }
	$(RUN) -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
