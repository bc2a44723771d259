"""Which score, objective and repair keep most accuracy, before and after recovery?"""
