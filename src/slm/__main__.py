"""`python -m slm`: the same as the `slm` command."""

from slm.cli import main

if __name__ == "__main__":
    main()
