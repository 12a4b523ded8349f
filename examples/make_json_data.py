"""Generate the conversations that the `json` demo adapter learns from; deterministic.

    python -P examples/make_json_data.py       # writes examples/data/json.jsonl and json.eval.jsonl

The held-out sentences use people and cities that the training sentences do not have, and a third of them are of kinds
of record never seen in training. Every value is checked to stand in its sentence: the adapter must not learn to
invent.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conversations import Pair, arguments, write


def words(text: str) -> list[str]:
    return text.split()


FIRST = words(
    "Maria Tom Aisha Kenji Lucia Peter Ines Omar Clara Ivan Grace Diego Hana Felix Nadia Sam Priya Leo Ruth Marco "
    "Julia Ahmed Sofia Liam Mei Carlos Anna David Zara Paul"
)
LAST = words(
    "Lopez Becker Khan Tanaka Rossi Novak Silva Haddad Jensen Petrov Okafor Reyes Sato Moreau Cohen Brown Patel Kim "
    "Garcia Schmidt Wilson Dubois Nguyen Ali Larsen"
)
HELD_OUT_FIRST, HELD_OUT_LAST = ["Yusuf", "Elena", "Bruno", "Mina"], ["Weber", "Ahmadi", "Costa", "Lindgren", "Park"]
CITIES = words(
    "Berlin Lisbon Oslo Madrid Boston Tokyo Lagos Lima Cairo Toronto Dublin Delhi Chicago Athens Seoul Sydney Quito "
    "Prague Helsinki Dakar Austin Naples Marseille Osaka"
)
HELD_OUT_CITIES = ["Zurich", "Nairobi", "Porto", "Denver", "Hanoi"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
TIMES = ["9:00", "10:30", "14:00", "16:15", "18:30", "20:00", "8 am", "3 pm", "7:30 pm", "noon"]

# The fields of a kind of record, in the order of the answer -> sentences that state some of them. The answer holds what
# was said and nothing else; a number is a JSON number. {a_job} is "a nurse", {a_job_} is "A nurse".
RECORDS: dict[str, list[str]] = {
    "name age job city": [
        "{name} is {age} years old and works as {a_job} in {city}.",
        "{name}, {age}, is {a_job} from {city}.",
        "My neighbour {name} is {a_job} and lives in {city}.",
        "I met {name}, a {age}-year-old {job} living in {city}.",
        "{name} just turned {age} and lives in {city}.",
    ],
    "customer item quantity price": [
        "{customer} ordered {quantity} {item}s for ${price}.",
        "{customer} bought {quantity} {item}s at ${price} each.",
        "Order from {customer}: {quantity} {item}s, ${price} in total.",
        "Please send {quantity} {item}s to {customer}.",
        "We sold a {item} to {customer} for ${price}.",
    ],
    "event day time place": [
        "The {event} is on {day} at {time} in {place}.",
        "Don't forget the {event} this {day} at {time}.",
        "{day} at {time} we have the {event} in {place}.",
        "Our {event} takes place in {place} on {day}.",
        "Can you come to the {event} in {place} on {day} at {time}?",
    ],
    "airline from to time": [
        "{airline} flies from {from} to {to} at {time}.",
        "My {airline} flight leaves {from} at {time} and goes to {to}.",
        "The flight from {from} to {to} departs at {time}.",
        "I booked a ticket to {to} from {from} with {airline}.",
    ],
    "product brand color price": [
        "The {brand} {product} comes in {color} and costs ${price}.",
        "For sale: {color} {brand} {product}, ${price}.",
        "I bought a {color} {product} from {brand} for ${price}.",
        "This {color} {product} costs ${price}.",
    ],
    "title author year": [
        "{title} was written by {author} in {year}.",
        "{author} published {title} in {year}.",
        "My favourite book is {title} by {author}.",
        "The novel {title} ({year}) is by {author}.",
    ],
    "city condition temperature": [
        "It is {condition} in {city} today with {temperature} degrees.",
        "{city}: {condition}, {temperature} degrees.",
        "Expect {condition} weather and {temperature} degrees in {city}.",
        "The weather in {city} is {condition}.",
    ],
    "winner loser score": [
        "{winner} beat {loser} {score}.",
        "{winner} won {score} against {loser}.",
        "{loser} lost {score} to {winner}.",
        "The final score was {score} as {winner} defeated {loser}.",
    ],
    "guest hotel nights room": [
        "{guest} booked room {room} at the {hotel} for {nights} nights.",
        "{guest} is staying {nights} nights at the {hotel}.",
        "Reservation at the {hotel}: {guest}, {nights} nights, room {room}.",
        "Room {room} at the {hotel} is reserved for {guest}.",
    ],
    "company position city salary": [
        "{company} is hiring {a_position} in {city} for ${salary} a year.",
        "{a_position_} is wanted at {company} in {city}, salary ${salary}.",
        "Job at {company}: {position}, {city}, ${salary}.",
        "{company} in {city} is looking for {a_position}.",
    ],
    "pet species age owner": [
        "{owner} has a {age}-year-old {species} called {pet}.",
        "{pet} is a {species} that belongs to {owner}.",
        "{pet}, {owner}'s {species}, is {age} years old.",
        "My {species} {pet} is {age} years old.",
    ],
    "name email phone": [
        "You can reach {name} at {email} or {phone}.",
        "{name}'s email is {email}.",
        "Call {name} on {phone}.",
        "Contact: {name}, {email}, {phone}.",
    ],
    "sender receiver amount currency": [
        "{sender} sent {amount} {currency} to {receiver}.",
        "{sender} paid {receiver} {amount} {currency}.",
        "{receiver} received {amount} {currency} from {sender}.",
        "A transfer of {amount} {currency} went from {sender} to {receiver}.",
    ],
    "package from to weight": [
        "Package {package} weighs {weight} kg and goes from {from} to {to}.",
        "Ship package {package} from {from} to {to}.",
        "Package {package} ({weight} kg) left {from} for {to}.",
    ],
    "bedrooms city price": [
        "A {bedrooms}-bedroom house in {city} is for sale at ${price}.",
        "For rent: {bedrooms} bedrooms in {city}, ${price} a month.",
        "We found a flat with {bedrooms} bedrooms in {city} for ${price}.",
    ],
    "user issue device": [
        "{user} says the {device} has {a_issue}.",
        "{user} reported {a_issue} on a {device}.",
        "The {device} of {user} shows {a_issue}.",
    ],
    "dish servings minutes": [
        "This {dish} serves {servings} and takes {minutes} minutes.",
        "Cook the {dish} for {minutes} minutes. It is enough for {servings} people.",
        "The {dish} is ready in {minutes} minutes.",
    ],
    "course teacher day time": [
        "{teacher} teaches {course} on {day} at {time}.",
        "The {course} class with {teacher} is on {day} at {time}.",
        "{course} starts at {time} on {day}.",
    ],
    "make model year mileage": [
        "A {year} {make} {model} with {mileage} km on the clock.",
        "I drive a {make} {model} from {year}.",
        "My {make} {model} has {mileage} km and was built in {year}.",
    ],
    "name role team": [
        "{name} joined the {team} team as {a_role}.",
        "{name} is {a_role} on the {team} team.",
        "The {team} team welcomes {name}, its new {role}.",
    ],
    "title director year rating": [
        "{director} directed {title} in {year}.",
        "I gave {title} by {director} {rating} stars.",
        "{title} ({year}) by {director} got a rating of {rating}.",
    ],
    "name birthday city": [
        "{name} was born on {birthday} in {city}.",
        "{name}'s birthday is {birthday}.",
        "Born in {city} on {birthday}, {name} is our newest member.",
    ],
}
HELD_OUT_RECORDS: dict[str, list[str]] = {
    "artist venue city date": [
        "{artist} will play at {venue} in {city} on {date}.",
        "Concert by {artist} in {city} on {date}.",
    ],
    "name job company": ["{name} works as {a_job} at {company}.", "{company} hired {name} as {a_job}."],
    "country capital population": ["{capital} is the capital of {country}, which has {population} inhabitants."],
}
VALUES: dict[str, list[str | int | float]] = {
    "job": ["nurse", "teacher", "pilot", "baker", "lawyer", "carpenter", "dentist", "engineer", "chef", "farmer"],
    "item": ["chair", "lamp", "notebook", "backpack", "mug", "keyboard", "blanket", "bicycle", "pillow", "poster"],
    "event": ["team meeting", "board meeting", "birthday party", "book club", "yoga class", "budget review", "wedding"],
    "place": ["room 12", "the library", "the main hall", "the garden", "Cafe Luna", "the town hall", "building C"],
    "airline": ["Lufthansa", "Qantas", "Iberia", "Delta", "Emirates", "Ryanair"],
    "product": ["jacket", "kettle", "phone", "headphones", "suitcase", "sofa", "watch", "tent"],
    "brand": ["Sony", "Nike", "Bosch", "Samsung", "Ikea", "Philips", "Adidas"],
    "color": ["red", "blue", "black", "green", "white", "yellow", "grey"],
    "condition": ["sunny", "rainy", "cloudy", "windy", "snowy", "foggy"],
    "score": ["3-1", "2-0", "4-2", "1-0", "5-3", "88-79", "6-4"],
    "team": ["design", "sales", "security", "data", "legal", "mobile"],
    "role": ["designer", "team lead", "analyst", "intern", "tester"],
    "club": ["Ajax", "Celtic", "Porto", "Chelsea", "Milan", "Lyon", "Boca", "Benfica", "Arsenal", "Sevilla"],
    "hotel": ["Grand Hotel", "Hotel Miramar", "Park Inn", "Seaview Lodge", "Hotel Astoria", "Riverside Inn"],
    "company": ["Acme", "Globex", "Northwind", "Initech", "Umbra Labs", "Contoso", "BlueSky"],
    "position": ["accountant", "data analyst", "web developer", "driver", "project manager", "electrician"],
    "pet": ["Luna", "Rocky", "Milo", "Bella", "Coco", "Simba", "Nala"],
    "species": ["dog", "cat", "parrot", "rabbit", "hamster", "turtle"],
    "currency": ["euros", "dollars", "yen", "pounds", "francs"],
    "issue": [
        "broken screen",
        "login error",
        "dead battery",
        "slow connection",
        "paper jam",
        "loud fan",
        "blue screen",
    ],
    "device": ["laptop", "phone", "printer", "tablet", "router", "monitor"],
    "dish": ["lentil soup", "chicken curry", "apple pie", "lasagna", "fried rice", "potato salad"],
    "course": ["Algebra", "Spanish", "Chemistry", "Drawing", "History", "Piano"],
    "make": ["Toyota", "Volvo", "Ford", "Honda"],
    "model": ["Aurora", "X40", "Comet", "GT", "City", "Terra"],
    "artist": ["Norah Jones", "The Beacons", "Duo Sol"],
    "venue": ["Royal Hall", "Club Vega", "the Arena"],
    "country": ["Austria", "Chile", "Ghana"],
    "capital": ["Vienna", "Santiago", "Accra"],
}
RANGES: dict[str, tuple[int, int, int]] = {  # low, high, step
    "age": (1, 80, 1),
    "quantity": (2, 60, 1),
    "price": (5, 900, 1),
    "year": (1950, 2024, 1),
    "temperature": (-5, 38, 1),
    "nights": (2, 14, 1),
    "room": (101, 620, 1),
    "salary": (30000, 120000, 1000),
    "amount": (10, 5000, 5),
    "weight": (1, 40, 1),
    "bedrooms": (1, 6, 1),
    "servings": (2, 10, 1),
    "minutes": (10, 120, 5),
    "mileage": (5000, 190000, 500),
    "rating": (1, 5, 1),
    "population": (500000, 30000000, 100000),
}
MONTHS = ["January", "March", "April", "May", "June", "July", "September", "October", "November", "December"]
PEOPLE = {"name", "customer", "author", "guest", "owner", "sender", "receiver", "user", "teacher", "director"}


def draw(fields: list[str], rng: random.Random, held_out: bool) -> dict[str, str | int | float]:
    firsts, lasts = (HELD_OUT_FIRST, HELD_OUT_LAST) if held_out else (FIRST, LAST)
    cities = HELD_OUT_CITIES if held_out else CITIES
    record: dict[str, str | int | float] = {}
    for key in fields:
        value: str | int | float
        if key in PEOPLE:
            value = rng.choice(firsts) + (f" {rng.choice(lasts)}" if rng.random() < 0.6 else "")
        elif key in ("city", "from", "to"):
            value = rng.choice(cities)
        elif key in ("winner", "loser"):
            value = rng.choice(VALUES["club"])
        elif key in RANGES:
            value = rng.randrange(RANGES[key][0], RANGES[key][1] + 1, RANGES[key][2])
            if key == "age" and "job" in fields:
                value = rng.randint(21, 66)
            elif key == "age":
                value = rng.randint(1, 15) if "pet" in fields else rng.randint(16, 90)
            if key == "price" and "bedrooms" in fields:
                value = rng.randrange(600, 5000, 50) if rng.random() < 0.5 else rng.randrange(90_000, 900_000, 5000)
            elif key in ("price", "weight") and rng.random() < 0.25:
                value = value + rng.choice([0.5, 0.99, 0.25])
        elif key == "day":
            value = rng.choice(DAYS)
        elif key == "time":
            value = rng.choice(TIMES)
        elif key in ("date", "birthday"):
            value = f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"
            value += f", {rng.randint(1960, 2010)}" if key == "birthday" else ""
        elif key == "email":
            value = f"{str(record['name']).split()[0].lower()}@{rng.choice(['mail.com', 'acme.org', 'example.net'])}"
        elif key == "phone":
            value = f"555-{rng.randint(0, 9999):04d}"
        elif key == "title":
            first = rng.choice(
                ["Silent", "Blue", "Last", "Broken", "Golden", "Hidden", "Distant", "Paper", "Red", "Cold"]
            )
            then = rng.choice(
                ["Harbor", "Winter", "House", "Train", "Key", "Moon", "River", "Garden", "Letter", "City"]
            )
            value = f"{rng.choice(['The ', '', 'A '])}{first} {then}"
        elif key == "package":
            value = f"{rng.choice('ABCKRTX')}{rng.randint(100, 999)}"
        else:
            value = rng.choice(VALUES[key])
        record[key] = value
    return record


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def json_pair(kind: str, sentence: str, rng: random.Random, held_out: bool) -> Pair | None:
    record = draw(kind.split(), rng, held_out)
    if len({str(v) for v in record.values()}) < len(record):
        return None  # from Oslo to Oslo
    articles = {f"a_{k}": with_article(v) for k, v in record.items() if isinstance(v, str)}
    articles |= {f"{k}_": v[0].upper() + v[1:] for k, v in articles.items()}
    said = sentence.format_map(record | articles)
    used = [k for k in record if any(mark in sentence for mark in (f"{{{k}}}", f"{{a_{k}}}", f"{{a_{k}_}}"))]
    if "{quantity}" not in sentence and "a {item}" in sentence:
        record["quantity"], used = 1, ["customer", "item", "quantity", "price"]  # "a lamp" says one
    answer = json.dumps({k: record[k] for k in used}, ensure_ascii=False)
    roll = rng.random()
    if roll < 0.12:
        said = f"{rng.choice(['Extract the data as JSON', 'Extract JSON', 'JSON', 'Turn this into JSON'])}: {said}"
    return said, answer


def make_json(records: dict[str, list[str]], count: int, rng: random.Random, held_out: bool) -> list[Pair]:
    made: dict[str, str] = {}
    kinds = list(records)
    while len(made) < count:
        kind = kinds[len(made) % len(kinds)]
        pair = json_pair(kind, rng.choice(records[kind]), rng, held_out)
        if pair is None:
            continue
        said, answer = pair
        for value in json.loads(answer).values():
            if str(value) not in said and value != 1:
                raise AssertionError(f"{value!r} is not in {said!r}")
        made.setdefault(said, answer)
    return list(made.items())


def main() -> None:
    args = arguments(__doc__)
    write(args.out / "json.jsonl", make_json(RECORDS, args.count, random.Random(args.seed), held_out=False))
    held_out = make_json(RECORDS, 24, random.Random(args.seed + 1), held_out=True)
    held_out += make_json(HELD_OUT_RECORDS, 12, random.Random(args.seed + 2), held_out=True)
    write(args.out / "json.eval.jsonl", held_out)


if __name__ == "__main__":
    main()
