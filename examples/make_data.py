"""Generate the training and held-out conversations of the `sql` and `json` demo adapters; deterministic.

    python -P examples/make_data.py            # writes examples/data/{sql,json}{,.eval}.jsonl

The pirate's data is written by hand (examples/data/pirate.jsonl). Held-out conversations use tables, kinds of record and
values that the training conversations do not have, so a low loss there is more than memory. Every query is prepared by
sqlite against its table, and every record is checked to hold nothing that the sentence does not say.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Pair = tuple[str, str]  # what the user says, what the assistant answers


# ---------------------------------------------------------------------------------------------------------------- sql


@dataclass(frozen=True)
class Table:
    """``texts``: column -> values; ``numbers``: column -> (low, high, superlative for most, superlative for least)."""

    name: str
    texts: dict[str, list[str]]
    numbers: dict[str, tuple[int, int, str, str]]
    date: str | None = None
    noun: str | None = None  # what people say, where it is not the table's name

    @property
    def rows(self) -> str:
        return self.noun or self.name

    @property
    def columns(self) -> list[str]:
        return ["id", "name", *self.texts, *self.numbers, *([self.date] if self.date else [])]


CITIES = ["Berlin", "Lisbon", "Oslo", "Madrid", "Boston", "Tokyo", "Lagos", "Lima", "Cairo", "Toronto", "Dublin", "Delhi"]
COUNTRIES = ["France", "Japan", "Brazil", "Kenya", "Canada", "India", "Norway", "Mexico", "Italy", "Vietnam"]

TABLES = [
    Table("customers", {"city": CITIES, "country": COUNTRIES, "email": []}, {"age": (18, 90, "oldest", "youngest")}),
    Table(
        "employees",
        {"department": ["Sales", "Marketing", "Finance", "Support", "Engineering"], "city": CITIES},
        {"salary": (30000, 120000, "highest paid", "lowest paid"), "age": (20, 65, "oldest", "youngest")},
        "hire_date",
    ),
    Table(
        "products",
        {"category": ["Toys", "Books", "Garden", "Electronics", "Kitchen"], "color": ["red", "blue", "black", "white"]},
        {"price": (5, 900, "most expensive", "cheapest"), "stock": (0, 500, "best stocked", "least stocked")},
    ),
    Table(
        "orders",
        {"status": ["pending", "shipped", "cancelled", "delivered"], "country": COUNTRIES},
        {"total": (10, 2000, "largest", "smallest")},
        "order_date",
    ),
    Table(
        "students",
        {"major": ["Biology", "History", "Physics", "Law"], "city": CITIES},
        {"grade": (1, 100, "best", "worst"), "age": (17, 40, "oldest", "youngest")},
    ),
    Table(
        "books",
        {"author": ["Jane Austen", "Mark Twain", "Agatha Christie"], "genre": ["mystery", "fantasy", "poetry"]},
        {"pages": (80, 900, "longest", "shortest"), "year": (1900, 2024, "newest", "oldest")},
    ),
    Table(
        "movies",
        {"director": ["Greta Gerwig", "Akira Kurosawa", "Jane Campion"], "genre": ["comedy", "drama", "horror"]},
        {"rating": (1, 10, "best rated", "worst rated"), "year": (1950, 2024, "newest", "oldest")},
    ),
    Table(
        "flights",
        {"origin": CITIES, "destination": CITIES, "airline": ["Condor", "Qantas", "Iberia"]},
        {"price": (60, 1500, "most expensive", "cheapest"), "duration": (1, 15, "longest", "shortest")},
    ),
    Table(
        "cars",
        {"brand": ["Toyota", "Volvo", "Ford", "Fiat"], "color": ["red", "silver", "green", "black"]},
        {"price": (3000, 60000, "most expensive", "cheapest"), "year": (1995, 2024, "newest", "oldest")},
    ),
    Table(
        "users",
        {"country": COUNTRIES, "plan": ["free", "pro", "team"], "email": [], "phone": []},
        {"age": (16, 80, "oldest", "youngest"), "logins": (0, 900, "most active", "least active")},
        "signup_date",
    ),
    Table(
        "songs",
        {"artist": ["Adele", "Miles Davis", "Rosalia"], "genre": ["jazz", "rock", "pop"]},
        {"duration": (90, 600, "longest", "shortest"), "plays": (0, 90000, "most played", "least played")},
    ),
    Table(
        "hotels",
        {"city": CITIES, "country": COUNTRIES},
        {"stars": (1, 5, "best", "worst"), "price": (40, 700, "most expensive", "cheapest")},
    ),
    Table(
        "patients",
        {"doctor": ["Dr. Cole", "Dr. Mehta", "Dr. Silva"], "city": CITIES, "phone": []},
        {"age": (1, 99, "oldest", "youngest"), "weight": (10, 120, "heaviest", "lightest")},
        "admission_date",
    ),
    Table(
        "invoices",
        {"customer": ["Acme", "Globex", "Initech"], "status": ["paid", "unpaid", "overdue"]},
        {"amount": (50, 9000, "largest", "smallest")},
        "due_date",
    ),
    Table(
        "tickets",
        {"status": ["open", "closed", "blocked"], "assignee": ["Maria", "Chen", "Omar"]},
        {"priority": (1, 5, "most urgent", "least urgent")},
        "created_at",
    ),
    Table(
        "players",
        {"team": ["Ajax", "Celtic", "Porto"], "position": ["goalkeeper", "defender", "forward"]},
        {"goals": (0, 60, "top scoring", "lowest scoring"), "height": (160, 210, "tallest", "shortest")},
    ),
    Table(
        "cities",
        {"country": COUNTRIES, "mayor": []},
        {"population": (10000, 9000000, "largest", "smallest"), "area": (20, 3000, "widest", "narrowest")},
    ),
    Table(
        "restaurants",
        {"cuisine": ["Thai", "Greek", "Indian"], "city": CITIES},
        {"rating": (1, 5, "best rated", "worst rated"), "seats": (10, 200, "biggest", "smallest")},
    ),
]
HELD_OUT_TABLES = [
    Table(
        "recipes",
        {"cuisine": ["Korean", "French"], "author": ["Nora", "Luis"]},
        {"minutes": (5, 180, "slowest", "quickest"), "calories": (90, 1200, "richest", "lightest")},
    ),
    Table(
        "museums",
        {"city": ["Vienna", "Seoul", "Athens"], "country": ["Austria", "Greece"]},
        {"visitors": (1000, 900000, "most visited", "least visited"), "rating": (1, 5, "best rated", "worst rated")},
    ),
    Table(
        "courses",
        {"teacher": ["Ms. Reed", "Mr. Park"], "level": ["beginner", "advanced"]},
        {"price": (20, 900, "most expensive", "cheapest"), "hours": (2, 80, "longest", "shortest")},
        "start_date",
    ),
]
ABOVE = ["above", "over", "greater than", "higher than", "of more than"]
BELOW = ["below", "under", "less than", "lower than"]


def plural(column: str) -> str:
    if column.endswith("s"):
        return column
    return f"{column[:-1]}ies" if column.endswith("y") else f"{column}s"


def spoken(column: str) -> str:
    return column.replace("_", " ")


class SqlWriter:
    """Draws one request and its query about one table; each ``ask_*`` method is a kind of question."""

    def __init__(self, table: Table, rng: random.Random):
        self.t, self.rng = table, rng
        kinds = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("ask_")]
        self.kinds: list[Callable[[], Pair | None]] = kinds

    def one(self) -> Pair:
        while True:
            pair = self.rng.choice(self.kinds)()
            if pair is not None:
                return self.dress(*pair)

    def dress(self, request: str, query: str) -> Pair:
        """As people put it: a plain request, one that asks for SQL, or one that gives the table's columns."""
        roll, lower = self.rng.random(), request[0].lower() + request[1:]
        if roll < 0.25:
            columns = ", ".join(self.t.columns)
            lead = self.rng.choice([f"Table {self.t.name}({columns}).", f"Given {self.t.name}({columns}):"])
            return f"{lead} {request}", query
        question = request.endswith("?")
        if roll < 0.45 and not question:
            lead = self.rng.choice(["Write a SQL query to", "SQL query to", "I need a query to", "Write SQL to"])
            return f"{lead} {lower.rstrip('.')}.", query
        return request, query

    def text(self) -> tuple[str, str]:
        column = self.rng.choice([c for c, values in self.t.texts.items() if values])
        return column, self.rng.choice(self.t.texts[column])

    def number(self) -> tuple[str, int]:
        column = self.rng.choice(list(self.t.numbers))
        low, high, *_ = self.t.numbers[column]
        value = self.rng.randint(low, high)
        size = 10 ** max(0, len(str(value)) - 2)
        return column, value if column == "year" else max(1, value // size * size)

    def where(self) -> tuple[str, str]:
        """A condition, in words after the noun and in SQL."""
        if self.rng.random() < 0.5:
            column, value = self.text()
            words = {
                "city": [f"in {value}", f"from {value}"],
                "country": [f"from {value}", f"in {value}"],
                "origin": [f"from {value}", f"leaving from {value}"],
                "destination": [f"to {value}", f"that go to {value}"],
                "department": [f"in the {value} department", f"who work in {value}"],
                "author": [f"by {value}", f"written by {value}"],
                "director": [f"by {value}", f"directed by {value}"],
                "artist": [f"by {value}"],
                "status": [f"with status {value}", f"that are {value}"],
                "category": [f"in the {value} category"],
                "team": [f"on the {value} team", f"who play for {value}"],
                "assignee": [f"assigned to {value}"],
            }.get(column, [f"whose {column} is {value}", f"with {column} {value}", f"where the {column} is {value}"])
            return self.rng.choice(words), f"{column} = '{value}'"
        column, value = self.number()
        if column == "year":
            word, op = self.rng.choice([("after", ">"), ("before", "<"), ("from", "=")])
            return f"{word} {value}", f"year {op} {value}"
        if column == "age" and self.rng.random() < 0.6:
            word, op = self.rng.choice([("older than", ">"), ("younger than", "<"), ("aged", "="), ("over", ">")])
            return f"{word} {value}", f"age {op} {value}"
        if column == "price" and self.rng.random() < 0.5:
            word, op = self.rng.choice([("that cost more than", ">"), ("that cost less than", "<"), ("under", "<")])
            return f"{word} {value}", f"price {op} {value}"
        roll = self.rng.random()
        if roll < 0.45:
            return f"with {spoken(column)} {self.rng.choice(ABOVE[:4])} {value}", f"{column} > {value}"
        if roll < 0.8:
            return f"with {spoken(column)} {self.rng.choice(BELOW)} {value}", f"{column} < {value}"
        return f"with at least {value} {spoken(column)}" if column.endswith("s") else (
            f"with a {spoken(column)} of at least {value}"
        ), f"{column} >= {value}"

    def get(self) -> str:
        return self.rng.choice(["Show", "List", "Find", "Get", "Give me", "Show me", "Select", "Return", "Display"])

    def ask_all(self) -> Pair:
        return f"{self.get()} all {self.t.rows}", f"SELECT * FROM {self.t.name};"

    def ask_where(self) -> Pair:
        words, sql = self.where()
        every = self.rng.choice(["all ", "", "the ", "every row of "]) if self.rng.random() < 0.6 else "all "
        every = "all " if every == "every row of " else every
        return f"{self.get()} {every}{self.t.rows} {words}", f"SELECT * FROM {self.t.name} WHERE {sql};"

    ask_where_again = ask_where  # the commonest request: drawn twice as often

    def ask_who(self) -> Pair:
        words, sql = self.where()
        return f"Which {self.t.rows} are there {words}?", f"SELECT * FROM {self.t.name} WHERE {sql};"

    def ask_names(self) -> Pair:
        words, sql = self.where()
        return f"{self.get()} the names of {self.t.rows} {words}", f"SELECT name FROM {self.t.name} WHERE {sql};"

    def ask_columns(self) -> Pair:
        other = self.rng.choice([*self.t.texts, *self.t.numbers])
        if self.rng.random() < 0.5:
            ask = f"{self.get()} the name and {spoken(other)} of all {self.t.rows}"
            return ask, f"SELECT name, {other} FROM {self.t.name};"
        words, sql = self.where()
        ask = f"{self.get()} the name and {spoken(other)} of {self.t.rows} {words}"
        return ask, f"SELECT name, {other} FROM {self.t.name} WHERE {sql};"

    def ask_two(self) -> Pair | None:
        (words, sql), (more, also) = self.where(), self.where()
        if sql.split()[0] == also.split()[0]:
            return None
        joiner = self.rng.choice(["and", "and", "or"])
        ask = f"{self.get()} {self.t.rows} {words} {joiner} {more}"
        return ask, f"SELECT * FROM {self.t.name} WHERE {sql} {joiner.upper()} {also};"

    def ask_count(self) -> Pair:
        if self.rng.random() < 0.25:
            ask = self.rng.choice([f"How many {self.t.rows} are there?", f"Count the {self.t.rows}"])
            return ask, f"SELECT COUNT(*) FROM {self.t.name};"
        words, sql = self.where()
        ask = self.rng.choice([f"How many {self.t.rows} are there {words}?", f"Count the {self.t.rows} {words}"])
        return ask, f"SELECT COUNT(*) FROM {self.t.name} WHERE {sql};"

    def ask_aggregate(self) -> Pair:
        column = self.rng.choice([c for c in self.t.numbers if c != "year"])
        word, function = self.rng.choice(
            [("average", "AVG"), ("average", "AVG"), ("total", "SUM"), ("highest", "MAX"), ("lowest", "MIN")]
        )
        tail, clause = "", ""
        if self.rng.random() < 0.4:
            words, sql = self.where()
            tail, clause = f" {words}", f" WHERE {sql}"
        ask = self.rng.choice([f"What is the {word} {column} of {self.t.rows}{tail}?", f"Get the {word} {column} of {self.t.rows}{tail}"])
        return ask, f"SELECT {function}({column}) FROM {self.t.name}{clause};"

    def ask_top(self) -> Pair:
        column, (_, _, most, least) = self.rng.choice(list(self.t.numbers.items()))
        n = self.rng.choice([1, 3, 5, 10, 20])
        word, order = self.rng.choice([(most, "DESC"), (most, "DESC"), (least, "ASC")])
        if column == "priority":
            order = "DESC" if word == most else "ASC"
        rows = self.t.rows if n > 1 else singular(self.t.rows)
        ask = f"{self.get()} the {n} {word} {rows}" if n > 1 else f"{self.get()} the {word} {rows}"
        if self.rng.random() < 0.3 and n > 1:
            ask = f"{self.get()} the top {n} {rows} by {column}"
            order = "DESC"
        return ask, f"SELECT * FROM {self.t.name} ORDER BY {column} {order} LIMIT {n};"

    ask_top_again = ask_top

    def ask_order(self) -> Pair:
        column = self.rng.choice(["name", *self.t.numbers])
        if self.rng.random() < 0.5:
            ask = f"{self.get()} all {self.t.rows} sorted by {column}"
            return ask, f"SELECT * FROM {self.t.name} ORDER BY {column};"
        if column == "name":
            ask = f"{self.get()} {self.t.rows} in alphabetical order"
            return ask, f"SELECT * FROM {self.t.name} ORDER BY name;"
        ask = f"{self.get()} {self.t.rows} ordered by {column}, highest first"
        return ask, f"SELECT * FROM {self.t.name} ORDER BY {column} DESC;"

    def group(self) -> str:
        return self.rng.choice([c for c, values in self.t.texts.items() if values])

    def ask_count_per(self) -> Pair:
        column = self.group()
        ask = self.rng.choice(
            [
                f"How many {self.t.rows} are there per {column}?",
                f"Count the {self.t.rows} in each {column}",
                f"Number of {self.t.rows} by {column}",
            ]
        )
        return ask, f"SELECT {column}, COUNT(*) FROM {self.t.name} GROUP BY {column};"

    def ask_average_per(self) -> Pair:
        column, value = self.group(), self.rng.choice([c for c in self.t.numbers if c != "year"])
        word, function = self.rng.choice([("average", "AVG"), ("total", "SUM"), ("highest", "MAX"), ("lowest", "MIN")])
        ask = self.rng.choice(
            [
                f"What is the {word} {value} of {self.t.rows} per {column}?",
                f"{self.get()} the {word} {value} of {self.t.rows} for each {column}",
                f"{word.capitalize()} {value} of {self.t.rows} by {column}",
            ]
        )
        return ask, f"SELECT {column}, {function}({value}) FROM {self.t.name} GROUP BY {column};"

    def ask_having(self) -> Pair:
        column, n = self.group(), self.rng.choice([2, 3, 5, 10, 50, 100])
        ask = f"Which {plural(column)} have more than {n} {self.t.rows}?"
        return ask, f"SELECT {column} FROM {self.t.name} GROUP BY {column} HAVING COUNT(*) > {n};"

    def ask_distinct(self) -> Pair:
        column = self.group()
        ask = f"{self.get()} the different {plural(column)} of the {self.t.rows}"
        return ask, f"SELECT DISTINCT {column} FROM {self.t.name};"

    def ask_like(self) -> Pair:
        letter = self.rng.choice("ABCDEFGHJKLMNPRSTW")
        ask = f"{self.get()} {self.t.rows} whose name starts with {letter}"
        return ask, f"SELECT * FROM {self.t.name} WHERE name LIKE '{letter}%';"

    def ask_between(self) -> Pair:
        column, value = self.number()
        high = value + self.rng.choice([5, 10, 20]) * 10 ** max(0, len(str(value)) - 2)
        high = value + 10 if column == "year" else high
        ask = f"{self.get()} {self.t.rows} with {column} between {value} and {high}"
        return ask, f"SELECT * FROM {self.t.name} WHERE {column} BETWEEN {value} AND {high};"

    def ask_missing(self) -> Pair | None:
        empty = [c for c, values in self.t.texts.items() if not values]
        if not empty:
            return None
        column = self.rng.choice(empty)
        ask, null = self.rng.choice(
            [
                (f"{self.get()} {self.t.rows} without {article(column)}", "IS NULL"),
                (f"{self.get()} {self.t.rows} that have {article(column)}", "IS NOT NULL"),
            ]
        )
        return ask, f"SELECT * FROM {self.t.name} WHERE {column} {null};"

    def ask_date(self) -> Pair | None:
        if self.t.date is None:
            return None
        year = self.rng.randint(2015, 2025)
        verb = {
            "hire_date": "hired",
            "order_date": "placed",
            "signup_date": "who signed up",
            "admission_date": "admitted",
            "due_date": "due",
            "created_at": "created",
            "start_date": "starting",
        }[self.t.date]
        day = f"{year}-{self.rng.randint(1, 12):02d}-{self.rng.randint(1, 28):02d}"
        words, sql = self.rng.choice(
            [
                (f"in {year}", f"BETWEEN '{year}-01-01' AND '{year}-12-31'"),
                (f"after {day}", f"> '{day}'"),
                (f"before {day}", f"< '{day}'"),
            ]
        )
        what, ask = self.rng.choice([("*", f"{self.get()} {self.t.rows} {verb} {words}"), ("COUNT(*)", "")])
        ask = ask or f"How many {self.t.rows} were {verb} {words}?".replace("were who signed", "signed")
        return ask, f"SELECT {what} FROM {self.t.name} WHERE {self.t.date} {sql};"

    def ask_recent(self) -> Pair | None:
        if self.t.date is None:
            return None
        n = self.rng.choice([5, 10, 20])
        word, order = self.rng.choice([("latest", "DESC"), ("most recent", "DESC"), ("earliest", "ASC")])
        ask = f"{self.get()} the {n} {word} {self.t.rows}"
        return ask, f"SELECT * FROM {self.t.name} ORDER BY {self.t.date} {order} LIMIT {n};"

    def ask_update(self) -> Pair:
        number, key = self.number()[0], self.rng.randint(1, 99)
        value = self.number()[1] if number != "year" else self.rng.randint(1990, 2024)
        if self.rng.random() < 0.5:
            ask = f"Set the {number} of {singular(self.t.rows)} {key} to {value}"
            return ask, f"UPDATE {self.t.name} SET {number} = {value} WHERE id = {key};"
        column, text = self.text()
        ask = f"Change the {column} of {singular(self.t.rows)} {key} to {text}"
        return ask, f"UPDATE {self.t.name} SET {column} = '{text}' WHERE id = {key};"

    def ask_delete(self) -> Pair:
        words, sql = self.where()
        ask = f"{self.rng.choice(['Delete', 'Remove'])} all {self.t.rows} {words}"
        return ask, f"DELETE FROM {self.t.name} WHERE {sql};"

    def ask_insert(self) -> Pair:
        column, value = self.text()
        name = self.rng.choice(["Aurora", "Max", "Delta", "Ruby", "Atlas", "Nova", "Hugo", "Iris"])
        ask = f"Add {article(singular(self.t.rows))} named {name} with {column} {value}"
        return ask, f"INSERT INTO {self.t.name} (name, {column}) VALUES ('{name}', '{value}');"


def singular(noun: str) -> str:
    return f"{noun[:-3]}y" if noun.endswith("ies") and noun != "movies" else noun.removesuffix("s")


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def make_sql(tables: list[Table], count: int, rng: random.Random) -> list[Pair]:
    database = sqlite3.connect(":memory:")
    for table in tables:
        database.execute(f"CREATE TABLE {table.name} ({', '.join(table.columns)})")
    made: dict[str, str] = {}
    while len(made) < count:
        ask, query = SqlWriter(tables[len(made) % len(tables)], rng).one()
        database.execute(f"EXPLAIN {query}")  # raises on a query that is not valid for its table
        made.setdefault(ask, query)
    return list(made.items())
