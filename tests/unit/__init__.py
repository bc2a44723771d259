"""One folder for each of the package's; a file of its own for each of its single files."""
