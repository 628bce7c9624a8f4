"""A contrastive loss for capdistill, found by name once this package is installed."""
