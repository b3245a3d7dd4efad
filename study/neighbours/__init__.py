"""Systems of other papers beside the grid, a file each, and what runs any of them."""
