"""Sources of examples: TensorFlow Datasets, image folders, generators."""
