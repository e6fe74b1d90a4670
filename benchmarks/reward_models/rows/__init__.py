"""The rows, one module for each kind of model; `ROWS` of every module is part of the table."""
