"""What a GPU is asked in one visit, in stages that each have a time and files of their own."""
