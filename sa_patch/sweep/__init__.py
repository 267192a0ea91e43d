"""WHAT is measured: grids of cells, run folders, local and Ray execution."""
