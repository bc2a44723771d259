"""How fast is a pruned network in a browser?"""
