"""In which engine is a pruned network fastest?"""
