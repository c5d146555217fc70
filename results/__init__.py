"""Results of the five projects: the files that runs write, and the commands that make and show them."""
