"""Methods for tasks that arrive one after another."""
