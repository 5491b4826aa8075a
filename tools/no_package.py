"""The build backend in pyproject.toml: makes `pip install .` fail with one clear line."""
raise SystemExit("This is no package, so nothing is installed: clone it and run the scripts in place, after "
                 "pip install -r requirements.txt")
