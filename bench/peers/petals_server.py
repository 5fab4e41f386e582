"""One PETALS server: the arguments are those of its own `run_server`; runs in PETALS' environment."""

from petals_hivemind import restore_names

restore_names()

from petals.cli import run_server  # noqa: E402

if __name__ == "__main__":
    run_server.validate_version = lambda: None  # it would ask the Internet for a newer one
    run_server.main()
