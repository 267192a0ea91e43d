"""What ``sa-patch analyze`` shows of each analysis: numbers, a figure and rows."""
