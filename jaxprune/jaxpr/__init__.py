"""Reading a function's jaxpr: the tape of its equations, once per call instance."""
