"""What studies share: data, training, measuring, results, tables, pictures."""
