"""In which engine is a network fastest, before and after pruning?"""
