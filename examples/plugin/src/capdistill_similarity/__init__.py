"""A loss on similarities for capdistill, found by name once this package is installed."""
