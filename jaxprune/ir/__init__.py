"""What a program is: its equations once per call, the axes of its arrays, the numbers in it."""
