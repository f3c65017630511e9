"""`python -m kagedb` is `kaged`."""

from .cli import main

if __name__ == "__main__":
    main()
