"""The quantized modules. Importing this package registers a class for every scheme."""
