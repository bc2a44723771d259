"""Statistics of what each weight multiplies, read off the jaxpr."""
