"""Generate the conversations that the `sql` demo adapter learns from; deterministic.

    python -P examples/make_sql_data.py        # writes examples/data/sql.jsonl and sql.eval.jsonl

The held-out requests are about tables that the training requests never mention: a low loss there is more than memory.
The tables are in examples/data/sql_tables.json. Every query is prepared by sqlite against its table: none is invalid,
none names a column that is not there.
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conversations import Pair, arguments, write


@dataclass(frozen=True)
class Table:
    """``texts``: column -> values; ``numbers``: column -> (low, high, superlative of the most, of the least)."""

    name: str
    texts: dict[str, list[str]]
    numbers: dict[str, tuple[int, int, str, str]]
    date: str | None = None
    label: str = "name"  # the column that says what a row is called

    @property
    def columns(self) -> list[str]:
        return ["id", self.label, *self.texts, *self.numbers, *([self.date] if self.date else [])]


def read_tables(path: Path, part: str) -> list[Table]:
    """The ``train`` or the ``held_out`` tables of sql_tables.json; "@cities" there stands for a list of values."""
    document = json.loads(path.read_text(encoding="utf-8"))
    tables: list[Table] = []
    for row in document[part]:
        texts = {
            column: document["values"].get(v, v) if isinstance(v, str) else v for column, v in row["texts"].items()
        }
        tables.append(Table(**{**row, "texts": texts}))
    return tables


FETCH = ["Show", "List", "Find", "Get", "Give me", "Show me", "Select", "Return", "Display"]
VERBS = {"Give", *FETCH, "Count", "Delete", "Remove", "Set", "Change", "Add"}
NOT_SUMMED = {"age", "grade", "rating", "height", "weight", "stars"}
ABOVE = ["above", "over", "greater than", "higher than"]
BELOW = ["below", "under", "less than", "lower than"]


def plural(column: str) -> str:
    if column.endswith("s"):
        return "statuses" if column == "status" else column
    return f"{column[:-1]}ies" if column.endswith("y") else f"{column}s"


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
        imperative = request.split()[0] in VERBS
        if roll < 0.45 and imperative:
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
            return f"with {column} {self.rng.choice(ABOVE)} {value}", f"{column} > {value}"
        if roll < 0.8:
            return f"with {column} {self.rng.choice(BELOW)} {value}", f"{column} < {value}"
        if column.endswith("s"):
            return f"with at least {value} {column}", f"{column} >= {value}"
        return f"with {article(column)} of at least {value}", f"{column} >= {value}"

    def get(self) -> str:
        return self.rng.choice(FETCH)

    def ask_all(self) -> Pair:
        return f"{self.get()} all {self.t.name}", f"SELECT * FROM {self.t.name};"

    def ask_where(self) -> Pair:
        words, sql = self.where()
        every = self.rng.choice(["all ", "all ", "the ", ""])
        return f"{self.get()} {every}{self.t.name} {words}", f"SELECT * FROM {self.t.name} WHERE {sql};"

    ask_where_again = ask_where  # the commonest request: drawn twice as often

    def ask_who(self) -> Pair:
        words, sql = self.where()
        return f"Which {self.t.name} are there {words}?", f"SELECT * FROM {self.t.name} WHERE {sql};"

    def ask_names(self) -> Pair:
        words, sql = self.where()
        return (
            f"{self.get()} the {self.t.label}s of {self.t.name} {words}",
            f"SELECT {self.t.label} FROM {self.t.name} WHERE {sql};",
        )

    def ask_columns(self) -> Pair:
        other = self.rng.choice([*self.t.texts, *self.t.numbers])
        if self.rng.random() < 0.5:
            ask = f"{self.get()} the {self.t.label} and {other} of all {self.t.name}"
            return ask, f"SELECT {self.t.label}, {other} FROM {self.t.name};"
        words, sql = self.where()
        ask = f"{self.get()} the {self.t.label} and {other} of {self.t.name} {words}"
        return ask, f"SELECT {self.t.label}, {other} FROM {self.t.name} WHERE {sql};"

    def ask_two(self) -> Pair | None:
        (words, sql), (more, also) = self.where(), self.where()
        if sql.split()[0] == also.split()[0]:
            return None
        joiner = self.rng.choice(["and", "and", "or"])
        ask = f"{self.get()} {self.t.name} {words} {joiner} {more}"
        return ask, f"SELECT * FROM {self.t.name} WHERE {sql} {joiner.upper()} {also};"

    def ask_count(self) -> Pair:
        if self.rng.random() < 0.25:
            ask = self.rng.choice([f"How many {self.t.name} are there?", f"Count the {self.t.name}"])
            return ask, f"SELECT COUNT(*) FROM {self.t.name};"
        words, sql = self.where()
        ask = self.rng.choice([f"How many {self.t.name} are there {words}?", f"Count the {self.t.name} {words}"])
        return ask, f"SELECT COUNT(*) FROM {self.t.name} WHERE {sql};"

    def ask_aggregate(self) -> Pair:
        column = self.rng.choice([c for c in self.t.numbers if c != "year"])
        word, function = self.rng.choice(
            [("average", "AVG"), ("average", "AVG"), ("total", "SUM"), ("highest", "MAX"), ("lowest", "MIN")]
        )
        if function == "SUM" and column in NOT_SUMMED:
            word, function = "average", "AVG"
        tail, clause = "", ""
        if self.rng.random() < 0.4:
            words, sql = self.where()
            tail, clause = f" {words}", f" WHERE {sql}"
        ask = self.rng.choice(
            [f"What is the {word} {column} of {self.t.name}{tail}?", f"Get the {word} {column} of {self.t.name}{tail}"]
        )
        return ask, f"SELECT {function}({column}) FROM {self.t.name}{clause};"

    def ask_top(self) -> Pair:
        column, (_, _, most, least) = self.rng.choice(list(self.t.numbers.items()))
        n = self.rng.choice([1, 3, 5, 10, 20])
        word, order = self.rng.choice([(most, "DESC"), (most, "DESC"), (least, "ASC")])
        rows = self.t.name if n > 1 else singular(self.t.name)
        ask = f"{self.get()} the {n} {word} {rows}" if n > 1 else f"{self.get()} the {word} {rows}"
        if self.rng.random() < 0.3 and n > 1:
            ask = f"{self.get()} the top {n} {rows} by {column}"
            order = "DESC"
        return ask, f"SELECT * FROM {self.t.name} ORDER BY {column} {order} LIMIT {n};"

    ask_top_again = ask_top

    def ask_order(self) -> Pair:
        column = self.rng.choice([self.t.label, *self.t.numbers])
        if self.rng.random() < 0.5:
            ask = f"{self.get()} all {self.t.name} sorted by {column}"
            return ask, f"SELECT * FROM {self.t.name} ORDER BY {column};"
        if column == self.t.label:
            ask = f"{self.get()} {self.t.name} in alphabetical order"
            return ask, f"SELECT * FROM {self.t.name} ORDER BY {column};"
        ask = f"{self.get()} {self.t.name} ordered by {column}, highest first"
        return ask, f"SELECT * FROM {self.t.name} ORDER BY {column} DESC;"

    def group(self) -> str:
        return self.rng.choice([c for c, values in self.t.texts.items() if values])

    def ask_count_per(self) -> Pair:
        column = self.group()
        ask = self.rng.choice(
            [
                f"How many {self.t.name} are there per {column}?",
                f"Count the {self.t.name} in each {column}",
                f"Number of {self.t.name} by {column}",
            ]
        )
        return ask, f"SELECT {column}, COUNT(*) FROM {self.t.name} GROUP BY {column};"

    def ask_average_per(self) -> Pair:
        column, value = self.group(), self.rng.choice([c for c in self.t.numbers if c != "year"])
        word, function = self.rng.choice([("average", "AVG"), ("total", "SUM"), ("highest", "MAX"), ("lowest", "MIN")])
        if function == "SUM" and value in NOT_SUMMED:
            word, function = "average", "AVG"
        ask = self.rng.choice(
            [
                f"What is the {word} {value} of {self.t.name} per {column}?",
                f"{self.get()} the {word} {value} of {self.t.name} for each {column}",
                f"{word.capitalize()} {value} of {self.t.name} by {column}",
            ]
        )
        return ask, f"SELECT {column}, {function}({value}) FROM {self.t.name} GROUP BY {column};"

    def ask_having(self) -> Pair:
        column, n = self.group(), self.rng.choice([2, 3, 5, 10, 50, 100])
        ask = f"Which {plural(column)} have more than {n} {self.t.name}?"
        return ask, f"SELECT {column} FROM {self.t.name} GROUP BY {column} HAVING COUNT(*) > {n};"

    def ask_distinct(self) -> Pair:
        column = self.group()
        ask = f"{self.get()} the different {plural(column)} of the {self.t.name}"
        return ask, f"SELECT DISTINCT {column} FROM {self.t.name};"

    def ask_like(self) -> Pair:
        letter = self.rng.choice("ABCDEFGHJKLMNPRSTW")
        ask = f"{self.get()} {self.t.name} whose {self.t.label} starts with {letter}"
        return ask, f"SELECT * FROM {self.t.name} WHERE {self.t.label} LIKE '{letter}%';"

    def ask_between(self) -> Pair:
        column, value = self.number()
        _, high, *_ = self.t.numbers[column]
        value = min(value, high - 1)
        other = self.rng.randint(value + 1, high)
        size = 1 if column == "year" else 10 ** max(0, len(str(other)) - 2)
        high = max(value + 1, other // size * size)
        ask = f"{self.get()} {self.t.name} with {column} between {value} and {high}"
        return ask, f"SELECT * FROM {self.t.name} WHERE {column} BETWEEN {value} AND {high};"

    def ask_missing(self) -> Pair | None:
        empty = [c for c, values in self.t.texts.items() if not values]
        if not empty:
            return None
        column = self.rng.choice(empty)
        ask, null = self.rng.choice(
            [
                (f"{self.get()} {self.t.name} without {article(column)}", "IS NULL"),
                (f"{self.get()} {self.t.name} that have {article(column)}", "IS NOT NULL"),
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
            "opening_date": "opened",
        }[self.t.date]
        day = f"{year}-{self.rng.randint(1, 12):02d}-{self.rng.randint(1, 28):02d}"
        words, sql = self.rng.choice(
            [
                (f"in {year}", f"BETWEEN '{year}-01-01' AND '{year}-12-31'"),
                (f"after {day}", f"> '{day}'"),
                (f"before {day}", f"< '{day}'"),
            ]
        )
        what, ask = self.rng.choice([("*", f"{self.get()} {self.t.name} {verb} {words}"), ("COUNT(*)", "")])
        ask = ask or f"How many {self.t.name} were {verb} {words}?".replace("were who signed", "signed")
        return ask, f"SELECT {what} FROM {self.t.name} WHERE {self.t.date} {sql};"

    def ask_recent(self) -> Pair | None:
        if self.t.date is None:
            return None
        n = self.rng.choice([5, 10, 20])
        word, order = self.rng.choice([("latest", "DESC"), ("most recent", "DESC"), ("earliest", "ASC")])
        ask = f"{self.get()} the {n} {word} {self.t.name}"
        return ask, f"SELECT * FROM {self.t.name} ORDER BY {self.t.date} {order} LIMIT {n};"

    def ask_update(self) -> Pair:
        (number, value), key = self.number(), self.rng.randint(1, 99)
        if self.rng.random() < 0.5:
            ask = f"Set the {number} of {singular(self.t.name)} {key} to {value}"
            return ask, f"UPDATE {self.t.name} SET {number} = {value} WHERE id = {key};"
        column, text = self.text()
        ask = f"Change the {column} of {singular(self.t.name)} {key} to {text}"
        return ask, f"UPDATE {self.t.name} SET {column} = '{text}' WHERE id = {key};"

    def ask_delete(self) -> Pair:
        words, sql = self.where()
        ask = f"{self.rng.choice(['Delete', 'Remove'])} all {self.t.name} {words}"
        return ask, f"DELETE FROM {self.t.name} WHERE {sql};"

    def ask_insert(self) -> Pair:
        column, value = self.text()
        name = self.rng.choice(["Aurora", "Max", "Delta", "Ruby", "Atlas", "Nova", "Hugo", "Iris"])
        called = "named" if self.t.label == "name" else "titled"
        ask = f"Add {article(singular(self.t.name))} {called} {name} with {column} {value}"
        return ask, f"INSERT INTO {self.t.name} ({self.t.label}, {column}) VALUES ('{name}', '{value}');"


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


def main() -> None:
    args = arguments(__doc__)
    tables = Path(__file__).parent / "data" / "sql_tables.json"
    write(args.out / "sql.jsonl", make_sql(read_tables(tables, "train"), args.count, random.Random(args.seed)))
    write(args.out / "sql.eval.jsonl", make_sql(read_tables(tables, "held_out"), 36, random.Random(args.seed + 1)))


if __name__ == "__main__":
    main()
