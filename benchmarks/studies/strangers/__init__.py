"""What README's recipe does to networks that it was not made on, in three frameworks."""
