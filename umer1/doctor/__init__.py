"""`umer1 doctor`: what is installed, what each piece is used for, and whether it works."""
