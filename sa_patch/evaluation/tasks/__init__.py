"""Tasks: their names, what their files say, and the data that they read or make."""
