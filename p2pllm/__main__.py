"""The outermost door: every letter is printed here, and nowhere else."""

import sys


def main() -> None:
    from p2pllm.cli import app
    from p2pllm.errors import P2PLLMError

    try:
        app()
    except P2PLLMError as error:
        sys.stderr.write(f"\n{error.letter}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
