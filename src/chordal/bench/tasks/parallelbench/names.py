"""Names of people: common first and last names in the United States."""

from __future__ import annotations

import random

FIRST = (
    "Aaron Abigail Adam Alan Alice Amanda Amber Amy Andrea Andrew Angela Anna Anthony Arthur Ashley Barbara "
    "Benjamin Betty Brandon Brenda Brian Carol Caroline Catherine Charles Cheryl Christina Cynthia Daniel "
    "David Deborah Dennis Diana Donald Donna Dorothy Douglas Edward Elizabeth Emily Eric Ethan Evelyn "
    "Frances Frank Gary George Gerald Gloria Grace Gregory Hannah Harold Heather Helen Henry Jacob James "
    "Janet Jason Jennifer Jessica Joan John Joseph Joshua Judith Julia Justin Karen Katherine Kathleen "
    "Keith Kenneth Kevin Kimberly Kyle Larry Laura Lauren Linda Lisa Margaret Maria Mark Martha Mary "
    "Matthew Melissa Michael Nancy Nathan Nicholas Nicole Olivia Pamela Patricia Patrick Paul Peter Rachel "
    "Raymond Rebecca Richard Robert Roger Ronald Ruth Ryan Samuel Sandra Sara Scott Sean Sharon Stephen "
    "Susan Teresa Theresa Thomas Timothy Tyler Victoria Vincent Virginia Walter William Zachary"
).split()

LAST = (
    "Adams Alexander Allen Anderson Armstrong Arnold Austin Bailey Baker Banks Barnes Barrett Bell Bennett "
    "Berry Bishop Black Boyd Bradley Brooks Brown Bryant Burke Burns Butler Campbell Carlson Carpenter Carr "
    "Carroll Carter Castillo Chapman Chavez Clark Cole Coleman Collins Cook Cooper Cox Crawford Cruz "
    "Cunningham Daniels Davidson Davis Day Dean Diaz Dixon Duncan Dunn Edwards Elliott Ellis Evans Ferguson "
    "Fernandez Fields Fisher Fleming Ford Foster Fowler Fox Franklin Freeman Fuller Garcia Gardner Garrett "
    "Gibson Gilbert Gomez Gonzalez Gordon Graham Grant Gray Green Greene Griffin Gutierrez Hall Hamilton "
    "Hansen Hanson Harper Harris Harrison Hart Harvey Hawkins Hayes Henderson Hicks Hill Hoffman Holland "
    "Holmes Howard Howell Hudson Hughes Hunt Hunter Jackson Jacobs Jenkins Jensen Johnson Jones Kelley "
    "Kelly Kennedy King Knight Lane Larson Lawrence Lawson Lewis Lopez Lynch Marshall Martin Martinez Mason "
    "Matthews Meyer Miller Mitchell Moore Morales Morgan Morris Morrison Murphy Murray Myers Nelson Newman "
    "Nguyen Nichols Oliver Olson Ortiz Palmer Parker Patel Patterson Payne Perez Perkins Perry Peters "
    "Peterson Phillips Pierce Porter Powell Price Ramirez Reed Reyes Reynolds Rice Richards Richardson "
    "Riley Rivera Roberts Robertson Robinson Rodriguez Rogers Romero Rose Ross Ruiz Russell Ryan Sanchez "
    "Sanders Schmidt Shaw Simmons Simpson Sims Smith Snyder Spencer Stanley Stephens Stevens Stewart Stone "
    "Sullivan Taylor Thomas Thompson Torres Tucker Turner Vargas Wagner Walker Wallace Ward Warren "
    "Washington Watkins Watson Weaver Webb Welch Wells West Wheeler White Williams Williamson Willis Wilson "
    "Wong Wood Woods Wright Young"
).split()


def draw_names(rng: random.Random, count: int) -> list[str]:
    """Draw different full names; two of them may share a first or a last name."""
    pairs = rng.sample(range(len(FIRST) * len(LAST)), count)
    return [f"{FIRST[pair // len(LAST)]} {LAST[pair % len(LAST)]}" for pair in pairs]
