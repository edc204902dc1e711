"""Toy tasks that show the library; configs name them."""
