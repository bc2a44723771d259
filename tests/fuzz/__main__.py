"""``python -m tests.fuzz``: random programs through ``jp.compact``."""

from tests.fuzz.run import main

if __name__ == "__main__":
    main()
