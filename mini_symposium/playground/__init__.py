"""The playground: a page of widgets over any run's models, and the plain functions below it."""
