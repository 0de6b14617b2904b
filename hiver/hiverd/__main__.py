"""`python -m hiverd` is `hiver`."""

from hiverd.cli import main

if __name__ == "__main__":
    main(prog_name="hiver")
