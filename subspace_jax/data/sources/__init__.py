"""Where examples come from: TensorFlow Datasets, folders, generators."""
