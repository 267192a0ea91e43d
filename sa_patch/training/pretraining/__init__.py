"""Language models trained from scratch, and methods compared at equal steps."""
