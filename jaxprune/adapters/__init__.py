"""A user's own modules at the small sizes: one file for each framework, none imported here."""
