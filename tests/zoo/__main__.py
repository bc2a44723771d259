"""``python -m tests.zoo``: models by others through ``jp.compact``."""

from tests.zoo.run import main

if __name__ == "__main__":
    main()
