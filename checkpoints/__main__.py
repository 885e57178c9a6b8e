"""``python -m checkpoints ls|verify|pull|push|gc URL …``."""

from checkpoints.cli import main

if __name__ == "__main__":
    main()
