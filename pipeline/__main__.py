"""`python -m pipeline`: the command line where it is not installed, as in a submitted job."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
