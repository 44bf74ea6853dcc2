"""probes.py — the sentences by which check_bert tells a BERT that was loaded rightly.

Kept apart from check_bert.py, since they are data.
"""

# Each pair says the same in other words; its words of weight occur in no other sentence.
PAIRS = (
    ("a dog is running over the grass", "the puppy sprints across a lawn"),
    ("a man is cooking dinner in the kitchen", "the chef prepares a meal at the stove"),
    ("a child is sleeping in a bed", "the baby naps under a blanket"),
    ("a plane is flying above the clouds", "the jet soars through a sky"),
    ("a boat is sailing on the lake", "the ship drifts along a river"),
    ("a woman is singing on stage", "the vocalist performs a song at the concert"),
    ("the doctor examines a patient", "a physician treats the ill in a hospital"),
    ("the judge sentenced a thief to prison", "a court sent the criminal to jail"),
    ("snow covers the mountain", "a peak is white and icy in winter"),
    ("the car stopped on a road", "a vehicle parked along the street"),
    ("a pupil reads a book at school", "the student studies a novel in the classroom"),
    ("the company earned a large profit", "a firm made the most money in business"),
    ("a bird built the nest in a tree", "the sparrow lays eggs on a branch"),
    ("soldiers fought a war", "the army attacked in a battle"),
    ("a farmer harvests wheat in the field", "the crops grow on a farm of corn"),
    ("the painter finished a portrait", "an artist drew the picture on canvas"),
    ("the king ruled a country", "a monarch governed the nation"),
    ("a goalkeeper caught the ball", "the soccer player scored in a football match"),
    ("rain fell during the storm", "a thunder brought wet weather"),
    ("the priest prayed in a church", "a bishop worships at the cathedral"),
    ("a computer runs the program", "the software was installed on a laptop"),
    ("the couple married in june", "a bride kissed the groom at the wedding"),
    ("a guitar lies beside the piano", "the violin is a musical instrument"),
    ("the planet orbits a star", "a moon circles the earth in space"),
)
# Sentences with a word in one sense, twice, and in another one, twice.
SENSES = {
    "bank": (
        "they fished from the grassy bank",
        "reeds covered a muddy bank of the stream",
        "she deposited cash at the bank",
        "the bank approved our loan",
    ),
    "bat": (
        "a bat hung upside down in the cave",
        "the furry bat flew at night eating insects",
        "he swung the bat and hit a home run",
        "the batter gripped a wooden bat",
    ),
    "spring": (
        "flowers bloom every spring",
        "in spring the snow melts and april comes",
        "a coiled metal spring bounced back",
        "the mattress has a broken spring",
    ),
    "match": (
        "she lit a match to start the fire",
        "a burning match fell in the candle wax",
        "our team lost the tennis match",
        "fans cheered during a football match",
    ),
    "bark": (
        "the rough bark of an oak tree",
        "moss grew on the birch bark",
        "the puppy gave a loud bark",
        "dogs bark at the mailman",
    ),
    "ring": (
        "the bride wore a diamond ring",
        "a gold ring slipped off her finger",
        "the boxer fell in the ring",
        "two wrestlers fought inside the ring",
    ),
    "plant": (
        "water the green plant in its pot",
        "this plant has large leaves",
        "workers left the nuclear plant",
        "the car plant shut its factory gates",
    ),
    "seal": (
        "a seal swam near the arctic ice",
        "the grey seal caught a fish",
        "the royal seal was stamped on wax",
        "she broke the seal of that envelope",
    ),
    "pitcher": (
        "the pitcher threw a fastball",
        "our pitcher struck out three hitters",
        "pour milk from the pitcher",
        "a glass pitcher of lemonade",
    ),
    "court": (
        "the judge adjourned the court",
        "a lawyer argued in court over the verdict",
        "players ran across the basketball court",
        "she served the ball on a tennis court",
    ),
    "crane": (
        "a crane lifted steel beams",
        "the construction crane towered above the building",
        "the white crane waded through a marsh",
        "a crane spread its wings and feathers",
    ),
    "palm": (
        "coconuts fell from the palm",
        "a palm swayed on the tropical beach",
        "he held a coin in his palm",
        "sweat covered her palm and fingers",
    ),
    "pupil": (
        "the pupil did his homework",
        "each pupil raised a hand in class",
        "the pupil of her eye widened",
        "light makes the pupil and iris contract",
    ),
    "trunk": (
        "the elephant raised its trunk",
        "water sprayed out of the trunk of a mammoth",
        "put our luggage in the trunk",
        "the car has a spare tire in its trunk",
    ),
    "organ": (
        "she played hymns on the church organ",
        "bach wrote music for the organ",
        "the liver is a vital organ",
        "surgeons transplanted an organ from a donor",
    ),
    "nail": (
        "hammer the nail into wood",
        "a rusty nail stuck out of the board",
        "she painted her nail red",
        "he bit the nail of his thumb",
    ),
    "ruler": (
        "the ruler governed an empire",
        "a cruel ruler taxed his subjects",
        "measure the line with a ruler",
        "a plastic ruler marked in inches",
    ),
    "star": (
        "a distant star in the galaxy",
        "telescopes saw the star explode",
        "the movie star signed autographs",
        "a pop star sang for fans",
    ),
    "letter": (
        "the first letter of the alphabet",
        "a capital letter begins each word",
        "he mailed a letter to his aunt",
        "the postman delivered a letter in an envelope",
    ),
    "chest": (
        "pirates buried the chest of gold",
        "an old wooden chest held blankets",
        "he felt pain in his chest and lungs",
        "the doctor listened to the heart in her chest",
    ),
    "mouse": (
        "the cat chased a mouse",
        "a mouse nibbled some cheese",
        "click the mouse to open a file",
        "the computer has a keyboard and a mouse",
    ),
    "club": (
        "he hit the golf ball with a club",
        "a caddie handed over the club",
        "we danced all night at the club",
        "the jazz club served drinks",
    ),
    "shot": (
        "the nurse gave a flu shot",
        "a vaccine shot in the arm",
        "the soldier fired a shot",
        "a gun shot echoed",
    ),
    "wave": (
        "a wave crashed on the shore",
        "surfers rode the huge wave",
        "she gave a friendly wave goodbye",
        "a wave of his hand greeted us",
    ),
}
