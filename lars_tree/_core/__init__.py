"""What all of the package rests on: no arrays, no trees."""
