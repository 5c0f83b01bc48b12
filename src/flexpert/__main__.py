"""`python -m flexpert`: the command line."""

from flexpert.cli.main import main

if __name__ == "__main__":
    main()
