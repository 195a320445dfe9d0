"""The next embedded model: pictures in which the same question needs other plans, and the recipe that trains it."""
